"""What the product exists for: which campaigns are worth showing to a user, and why."""
