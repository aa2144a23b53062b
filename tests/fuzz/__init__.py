"""Reads damaged files as a stranger may send them, and tells what does not end as it should.

`mutate` damages files; `annotation_target`, `weights_target`, `records_target` and `video_target`
make valid ones and read the damaged; `sandbox` watches one reading process; `harness` runs it all.
"""
