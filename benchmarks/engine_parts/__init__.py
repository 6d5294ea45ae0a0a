"""The parts of `engine.py`: each measures one property of the second-order engine and returns plain numbers."""
