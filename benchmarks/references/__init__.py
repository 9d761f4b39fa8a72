"""What the API is measured beside: each an ASGI app `app`, served as the API is."""
