"""Where sessions are kept, behind one protocol: in this process's memory, or in Redis for several machines."""
