"""What one client sends is not paid for by another: attacks on a real server with a well-behaved client beside them."""
