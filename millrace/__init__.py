"""millrace."""
