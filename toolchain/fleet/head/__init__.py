"""The head of an endpoint and what it stands on: its loop, the versions that it runs, and what operators ask of it.

``head`` runs the rounds of the controller, ``ground`` opens the board and Dynamo's plane for one machine or for many,
``versions`` keeps the repositories that replicas run, ``asking`` carries an operator's command to it. What is to be
done, ``control`` says; no other room knows this one.
"""
