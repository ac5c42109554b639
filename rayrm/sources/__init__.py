"""Foreign data → our rows; the only place where foreign column names appear."""
