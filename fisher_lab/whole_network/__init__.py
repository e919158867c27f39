"""The Fisher of the whole network: products, solves, and how good a step is by it."""

from fisher_lab.whole_network.asking import network as network
from fisher_lab.whole_network.asking import network_of as network_of
from fisher_lab.whole_network.fisher import NetworkFisher as NetworkFisher
