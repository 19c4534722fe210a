"""The idea: sampled elements in segments, who sees whom, the drafter, its loss, relay. Knows no files and no target."""
