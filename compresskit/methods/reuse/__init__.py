"""Methods that compute less by keeping what an earlier request has computed."""
