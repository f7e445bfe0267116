"""Where files lie: folders to write into, on a disk or in an object store, their locks, and files at URLs."""
