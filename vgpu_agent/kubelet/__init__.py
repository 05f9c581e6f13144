"""The kubelet side: the device plugin API, its session, and the only users of betterproto."""
