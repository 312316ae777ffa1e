"""The parts of `xpo check`, which tries a run out, measures it and reports what it finds."""
