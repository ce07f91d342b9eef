"""What serves many sessions and steps: arithmetic, a simulation of replicas and shards, its check (`make scale`)."""
