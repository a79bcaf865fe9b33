"""Starting the work: ranks on this machine, jobs on a cluster, sweeps of many configs."""
