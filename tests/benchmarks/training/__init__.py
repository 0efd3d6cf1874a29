"""The parts of the experiment on training: its arms, what is measured of each, what follows."""
