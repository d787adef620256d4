"""What a fleet of replicas would do: a simulation from measured costs. Needs numpy, and no torch."""

from hotswap_server.fleet.costs import Costs as Costs
from hotswap_server.fleet.costs import StepCosts as StepCosts
from hotswap_server.fleet.options import Fleet as Fleet
from hotswap_server.fleet.options import FleetError as FleetError
from hotswap_server.fleet.options import Traffic as Traffic
from hotswap_server.fleet.search import Target as Target
from hotswap_server.fleet.search import replicas_needed as replicas_needed
from hotswap_server.fleet.simulate import FleetReport as FleetReport
from hotswap_server.fleet.simulate import simulate as simulate
