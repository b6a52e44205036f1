"""The parts of the stand-in for the Hub, which `helpers.hub_server` puts together."""
