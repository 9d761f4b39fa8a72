"""The catalog a marketer edits: read, checked, proposed."""
