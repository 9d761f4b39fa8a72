"""Where Airflow finds the plugin: it looks through this folder, and `.airflowignore` hides the package from it."""

from personalization_airflow.ui import PersonalizationPlugin

__all__ = ["PersonalizationPlugin"]
