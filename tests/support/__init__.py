"""What tests share: servers, faults, waiting."""
