"""The XPO loss, preference losses, and the schedules of alpha and beta."""
