"""What the mount shows, without FUSE: sessions' directories, imports, and files under any path."""
