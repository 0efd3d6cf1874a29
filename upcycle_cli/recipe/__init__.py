"""What the user wants: E, G, T, routing, scaling, options, recipe files."""
