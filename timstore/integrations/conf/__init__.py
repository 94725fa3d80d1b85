"""Hydra configurations of the trainers for OpenUnlearning: `pkg://timstore.integrations.conf`."""
