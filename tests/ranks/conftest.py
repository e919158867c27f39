from tests.ranks.crew import crews as crews
