"""What the cloud says about the near end of this machine."""
