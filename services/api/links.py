"""Links of the OpenAPI document: what can be asked next about the user an answer names."""

from typing import Any

_ABOUT_A_USER = {
    "recommendations": "What to show to this user.",
    "profile": "What is known of this user.",
    "similar": "Who is like this user.",
    "erase_user": "Forget this user.",
}


def about(user_id: str, *operations: str) -> dict[str, Any]:
    """OpenAPI's `links` to these operations, for the user whom the runtime expression `user_id` names."""
    return {
        "links": {
            one: {"operationId": one, "description": _ABOUT_A_USER[one], "parameters": {"user_id": user_id}}
            for one in operations
        }
    }
