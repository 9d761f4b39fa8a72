"""What only Airflow loads: the Milvus hook, its connection form, and clients from connections."""
