"""`WS /stream`: many sessions over one socket."""
