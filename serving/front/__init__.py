"""What clients connect to: it knows the replicas that live, sends each request to one of them, and to another where that one fails.

Ray Serve starts, watches and ends the replicas; tokens go from a replica over the front to the client without passing through Ray, whose
proxy took a tenth of the throughput at 32 streams and answers 404 while an application ends.
"""
