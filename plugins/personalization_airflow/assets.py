"""What the DAGs hand each other, so that Airflow draws the flow of data and can run one after another."""

from airflow.sdk import Asset

MESSAGES = Asset("personalization_messages")
"""What users said: MongoDB's `conversations`, with `quarantine` beside it."""

EVENTS = Asset("personalization_events")
"""What users did with campaigns, ready to be rolled up."""

SERVING = Asset("personalization_serving")
"""What the API answers from, and the stores behind it. Its events carry the run's figures."""

EVALUATION = Asset("personalization_evaluation")
"""The figures of the offline evaluation."""
