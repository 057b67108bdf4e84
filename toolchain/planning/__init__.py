"""What can be known before anything is built: memory, speed, money, the plan, the choice. Pure: no GPU, no network."""
