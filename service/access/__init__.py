"""Who may, and what others may not read: API keys, addresses of peers, private files."""
