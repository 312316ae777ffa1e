"""The command line: `xpo fit | validate | predict | check | compare | export | chat | ...`."""
