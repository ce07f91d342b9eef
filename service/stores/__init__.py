"""Where sessions outlive a process."""
