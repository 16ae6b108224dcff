"""The thin layer over Ray: a pool of replicas, and the search that asks it. All of `import ray`."""
