"""The client half: what a method author writes, and the Flower ``ClientApp`` it becomes."""
