"""Run directories and sweep directories: records, files, caches, progress."""
