"""Endpoints over several replicas, on NVIDIA Dynamo: a worker in front of each Triton, and the gateway's way to it.

Dynamo (ai-dynamo-runtime) discovers the workers, routes requests to the least loaded, and continues a request on
another worker when one is lost. It is imported inside functions alone, when an endpoint runs.

    head       what runs beside the gateway, and decides        uses every other room
    node       what runs on each machine with GPUs              uses worker, control
    front      text, routes and counting, in the gateway        uses worker, control
    hosts      how machines of other networks join              uses no other room
    worker     the process in front of one Triton               uses no other room
    control    what the controller decides, as pure functions   uses no other room

Here lies what the rooms share: DEPLOYMENT.yaml (``deployment``), what goes over the board and to the workers
(``board``, ``wire``), Dynamo's runtime (``plane``), and who is who (``trust``).
"""
