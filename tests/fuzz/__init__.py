"""Reads damaged files, as from an untrusted source, and reports every reader that misbehaves.

`mutate` damages files. `annotation_target`, `weights_target`, `records_target` and `video_target`
make valid files and read the damaged ones. `sandbox` watches one reading process, `harness` runs
them all with damages at random, and `guided` with damages that reach new code.
"""
