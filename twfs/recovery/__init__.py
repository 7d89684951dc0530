"""After damage: tables and blocks repaired, or the metadata made anew from the devices."""
