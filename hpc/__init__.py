"""How a process lives on a cluster; knows nothing of images."""
