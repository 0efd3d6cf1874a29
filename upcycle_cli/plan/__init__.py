"""What will be written: expressions, tensors, and the plans of upcycling, growing and merging."""
