"""One module a store: connect, ensure the schema, write in bulk, read."""
