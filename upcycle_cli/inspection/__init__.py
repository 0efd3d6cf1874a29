"""What a checkpoint is: summary, experts, weight drift, expert load."""
