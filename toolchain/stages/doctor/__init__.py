"""doctor: examine a machine: what works, what is missing, what to type. Changes nothing.

``examine`` looks at this machine and the artifacts on it, whatever they are for. ``preflight`` holds one plan against
the machine that is to build its engine, which ``probe`` looks at: this one, or one behind ssh.
"""

from toolchain.hosts.probe import Machine
from toolchain.stages.doctor.finding import Finding
from toolchain.stages.doctor.machine import examine
from toolchain.stages.doctor.preflight import preflight
from toolchain.stages.doctor.probe import Target, look, target_of

__all__ = ["Finding", "Machine", "Target", "examine", "look", "preflight", "target_of"]
