"""What the past teaches: knowledge of campaigns and users as it was at any moment, and rankers fitted to it."""
