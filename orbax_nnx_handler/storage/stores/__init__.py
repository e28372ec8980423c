"""Where bytes lie: files of a disk or a bucket, and the database that a checkpoint may be."""
