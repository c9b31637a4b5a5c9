"""One file per paper: what it claims and the experiment that checks it."""
