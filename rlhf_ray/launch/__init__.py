"""Ray, for the stages: a cluster to run on, resources that fit, a worker group, and the channel between driver and workers.

In come a job and the body of a stage; out comes the `Run` that rank 0 returns, or the error that it raised. Read `launch.py` first;
`resources.py` says what each role asks Ray for, `preflight.py` whether that can fit, `placement.py` takes it or gives everything
back, `ray_cluster.py` starts or joins a Ray, `channel.py` carries events, stop requests and errors. It must not know what a body
does; what an actor loads is handed in as builders.
"""
