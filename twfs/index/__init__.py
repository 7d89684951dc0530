"""What is known of every block in memory, by slot: its place, its uses, its charges, its leases."""
