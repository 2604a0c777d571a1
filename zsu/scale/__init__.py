"""Chapter 9: many classes, seeds and machines. `sweep.run`, the scoreboard, and the paper's experiments again."""
