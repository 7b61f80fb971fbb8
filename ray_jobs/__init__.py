"""The only importer of Ray: the cluster, the teachers' pool, the stream, and one file per job."""
